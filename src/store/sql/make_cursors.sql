-- Cursors of a group for partitions of a topic on this node that lack one. None where the node does
-- not know where the group starts: it did, and was put back to before. Primary keys.
-- $1 topic  $2 group  $3 one partition, or null: all  $4 id of the topic
insert into shardmq.cursor (group_name, partition, acked_id)
select $2, p.partition, shardmq.start_position($1, $2, p.partition)
  from shardmq.partition p
 where p.topic_id = $4 and p.state <> 'deleted' and p.partition = coalesce($3::int, p.partition)
   and not exists (select from shardmq.cursor c where c.group_name = $2 and c.partition = p.partition)
   and exists (select from shardmq.group_start s where s.topic = $1 and s.group_name = $2)
on conflict do nothing
