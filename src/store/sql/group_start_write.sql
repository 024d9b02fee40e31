-- Resolves a group's start on this node, unless somebody did: at a time, or by this node's clock. Not where the
-- topic is gone, or another one has its name by now.
-- $1 topic  $2 group  $3 time (null: now)  $4 id  $5 whether it is of one consumer alone  $6 id of the topic
insert into shardmq.group_start (topic, group_name, start_at, start_id, broadcast, seen_at)
select $1, $2, coalesce($3::timestamptz, shardmq.clock()), $4, $5, shardmq.clock()
 where exists (select from shardmq.partition p where p.topic_id = $6 and p.state <> 'deleted')
on conflict do nothing
