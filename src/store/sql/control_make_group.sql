-- Records a group's start: at a time, or by this database's clock. Not where the topic is gone, or another one
-- has its name by now. Primary keys.
-- $1 topic  $2 group  $3 time (null: now)  $4 id  $5 whether it is of one consumer alone  $6 id of the topic
insert into shardmq_control.consumer_group (topic, group_name, start_at, start_id, from_clock, broadcast)
select t.topic, $2, coalesce($3::timestamptz, clock_timestamp()), $4, $3::timestamptz is null, $5
  from shardmq_control.topic t
 where t.topic = $1 and t.topic_id = $6
   for key share
on conflict do nothing
