-- Records a group's start: at a time, or by this database's clock.
-- $1 topic  $2 group  $3 time (null: now)  $4 id  $5 whether it is of one consumer alone
insert into shardmq_control.consumer_group (topic, group_name, start_at, start_id, from_clock, broadcast)
values ($1, $2, coalesce($3::timestamptz, clock_timestamp()), $4, $3::timestamptz is null, $5)
on conflict do nothing
