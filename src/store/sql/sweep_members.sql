-- Removes members whose lease ended more than a day ago, and those that have left more than an hour ago.
delete from shardmq.member
 where leased_until < shardmq.clock() - interval '1 day'
   and (left_at is null or left_at < shardmq.clock() - interval '1 hour')
